//! Cores, NUMA nodes and adapters of this machine, and which threads go where.
//!
//! Cores come from hwloc; NUMA nodes and the place of adapters come from sysfs, because looking up NUMA
//! nodes through the `hwloc2` crate panics with hwloc 2.9. Where hwloc fails, sysfs gives the cores too; where
//! that fails, every CPU this process may use counts as a core. Discovery itself never fails.
//!
//! Only CPUs that this process may run on (its affinity, set by a batch system or a container) are ever used.

use std::{
    collections::{BTreeMap, BTreeSet},
    path::Path,
};

/// A machine with fewer cores than this has none to spare: threads stay unbound, and the scheduler places them.
pub const MIN_CORES_TO_BIND: usize = 4;
/// Event loops that read from /dev/fuse, if nobody says how many: more than this gains nothing behind one core thread.
pub const MAX_CHOSEN_FUSE_THREADS: usize = 4;

/// Numbers of CPUs as the kernel counts them, ascending.
pub type Cpus = BTreeSet<u32>;

/// A core: the CPUs (hardware threads) that share its execution units.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Core {
    pub cpus: Cpus,
    /// The NUMA node it belongs to; `None` where the kernel tells of none.
    pub numa_node: Option<u32>,
}

/// An RDMA adapter.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Adapter {
    /// As in /sys/class/infiniband.
    pub name: String,
    /// The NUMA node it is attached to; `None` for software adapters and machines with a single node.
    pub numa_node: Option<u32>,
}

/// Who told of the cores.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Source {
    Hwloc,
    Sysfs,
    /// Nobody: every CPU counts as a core.
    Affinity,
}

/// What this process can use of the machine.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Topology {
    /// Never empty.
    pub cores: Vec<Core>,
    pub adapters: Vec<Adapter>,
    pub source: Source,
}

/// Where the threads of a daemon run. An empty set: anywhere.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Placement {
    /// For the thread that drives the executor.
    pub core_thread: Cpus,
    /// For each event loop that reads from /dev/fuse.
    pub fuse_threads: Vec<Cpus>,
}

impl Topology {
    /// Looks at this machine.
    pub fn discover() -> Topology {
        Topology::discover_in(Path::new("/sys"), &allowed_cpus(), hwloc_cores)
    }

    /// As [`Topology::discover`], with the parts named: a sysfs tree, the CPUs that may be used, and who tells of cores.
    fn discover_in(sysfs: &Path, allowed: &Cpus, hwloc: impl FnOnce() -> Option<Vec<Cpus>>) -> Topology {
        let numa_nodes = numa_nodes(sysfs);
        let usable = |cores: Vec<Cpus>| {
            let mut cores: Vec<Cpus> = cores
                .into_iter()
                .map(|core| core.intersection(allowed).copied().collect::<Cpus>())
                .filter(|core| !core.is_empty())
                .collect();
            cores.sort();
            cores.dedup();
            (!cores.is_empty()).then_some(cores)
        };
        let (cores, source) = if let Some(cores) = hwloc().and_then(usable) {
            (cores, Source::Hwloc)
        } else if let Some(cores) = sysfs_cores(sysfs).and_then(usable) {
            (cores, Source::Sysfs)
        } else {
            (allowed.iter().map(|cpu| Cpus::from([*cpu])).collect(), Source::Affinity)
        };
        let node_of = |cpus: &Cpus| numa_nodes.iter().find(|(_, node)| !node.is_disjoint(cpus)).map(|(id, _)| *id);
        let cores = cores.into_iter().map(|cpus| Core { numa_node: node_of(&cpus), cpus }).collect();
        Topology { cores, adapters: adapters(sysfs), source }
    }

    /// Event loops to run if nobody says how many: half the cores, at least 1, at most [`MAX_CHOSEN_FUSE_THREADS`].
    pub fn fuse_threads(&self) -> usize {
        (self.cores.len() / 2).clamp(1, MAX_CHOSEN_FUSE_THREADS)
    }

    /// Chooses cores for one daemon: cores near `adapter` first, one for the core thread, then one for each of
    /// `fuse_threads` event loops, which share what is left when there are not enough. `daemon` numbers the daemons on
    /// this machine, so that their core threads do not meet. On small machines nothing is bound.
    pub fn place(&self, adapter: Option<&str>, fuse_threads: usize, daemon: usize) -> Placement {
        if self.cores.len() < MIN_CORES_TO_BIND {
            return Placement { core_thread: Cpus::new(), fuse_threads: vec![Cpus::new(); fuse_threads] };
        }
        let near = adapter
            .and_then(|name| self.adapters.iter().find(|adapter| adapter.name == name))
            .and_then(|adapter| adapter.numa_node);
        let mut cores: Vec<&Core> = self.cores.iter().collect();
        // Stable: cores keep their order within near and far.
        cores.sort_by_key(|core| near.is_some() && core.numa_node != near);
        let near_count = cores.iter().filter(|core| near.is_none() || core.numa_node == near).count();
        let turn = daemon * (1 + fuse_threads) % near_count.max(1);
        cores[..near_count].rotate_left(turn);
        let (first, rest) = cores.split_first().expect("a topology has cores");
        Placement {
            core_thread: first.cpus.clone(),
            fuse_threads: (0..fuse_threads).map(|thread| rest[thread % rest.len()].cpus.clone()).collect(),
        }
    }
}

/// Restricts the calling thread to `cpus`. An empty set changes nothing.
///
/// # Errors
/// The kernel's, when none of the CPUs may be used; the thread then stays where it was. The message names the CPUs.
pub fn bind_current_thread(cpus: &Cpus) -> std::io::Result<()> {
    use rustix::thread::{CpuSet, sched_setaffinity};
    if cpus.is_empty() {
        return Ok(());
    }
    let mut set = CpuSet::new();
    for &cpu in cpus {
        if (cpu as usize) < CpuSet::MAX_CPU {
            set.set(cpu as usize);
        }
    }
    sched_setaffinity(None, &set).map_err(|errno| {
        let error = std::io::Error::from(errno);
        std::io::Error::new(error.kind(), format!("cannot bind a thread to CPUs {cpus:?}: {error}"))
    })
}

/// CPUs that this process may run on; at least CPU 0.
fn allowed_cpus() -> Cpus {
    use rustix::thread::{CpuSet, sched_getaffinity};
    let allowed: Cpus = match sched_getaffinity(None) {
        Ok(set) => (0..CpuSet::MAX_CPU).filter(|cpu| set.is_set(*cpu)).map(|cpu| cpu as u32).collect(),
        // The kernel knows more CPUs than the set can hold.
        Err(_) => (0..std::thread::available_parallelism().map_or(1, |count| count.get() as u32)).collect(),
    };
    if allowed.is_empty() { Cpus::from([0]) } else { allowed }
}

/// The cores that hwloc sees, as sets of CPUs. `None` where it fails.
fn hwloc_cores() -> Option<Vec<Cpus>> {
    // The bindings panic where the library gives what they do not expect.
    let looked = std::panic::catch_unwind(|| {
        let topology = hwloc2::Topology::new()?;
        let cores = topology.objects_with_type(&hwloc2::ObjectType::Core).ok()?;
        let cpus = |set: hwloc2::CpuSet| {
            let last = u32::try_from(set.last()).ok()?; // -1: empty or endless
            Some((0..=last).filter(|cpu| set.is_set(*cpu)).collect::<Cpus>())
        };
        cores.into_iter().map(|core| core.cpuset().and_then(cpus)).collect::<Option<Vec<Cpus>>>()
    });
    looked.ok().flatten()
}

/// The cores that sysfs tells of. `None` where it tells of none.
fn sysfs_cores(sysfs: &Path) -> Option<Vec<Cpus>> {
    let mut cores = BTreeSet::new();
    for entry in std::fs::read_dir(sysfs.join("devices/system/cpu")).ok()? {
        let entry = entry.ok()?;
        let name = entry.file_name();
        let Some(Ok(cpu)) = name.to_str().and_then(|name| name.strip_prefix("cpu")).map(str::parse::<u32>) else {
            continue;
        };
        let topology = entry.path().join("topology");
        let siblings = ["core_cpus_list", "thread_siblings_list"]
            .iter()
            .find_map(|file| parse_list(&std::fs::read_to_string(topology.join(file)).ok()?))
            .filter(|siblings| siblings.contains(&cpu));
        if let Some(siblings) = siblings {
            cores.insert(siblings);
        }
    }
    (!cores.is_empty()).then(|| cores.into_iter().collect())
}

/// NUMA nodes and their CPUs; empty where the kernel was built without them.
fn numa_nodes(sysfs: &Path) -> BTreeMap<u32, Cpus> {
    let Ok(entries) = std::fs::read_dir(sysfs.join("devices/system/node")) else { return BTreeMap::new() };
    entries
        .flatten()
        .filter_map(|entry| {
            let id = entry.file_name().to_str()?.strip_prefix("node")?.parse().ok()?;
            Some((id, parse_list(&std::fs::read_to_string(entry.path().join("cpulist")).ok()?)?))
        })
        .collect()
}

/// RDMA adapters by name.
fn adapters(sysfs: &Path) -> Vec<Adapter> {
    let Ok(entries) = std::fs::read_dir(sysfs.join("class/infiniband")) else { return Vec::new() };
    let mut adapters: Vec<Adapter> = entries
        .flatten()
        .filter_map(|entry| {
            let node = std::fs::read_to_string(entry.path().join("device/numa_node")).ok();
            // The kernel writes -1 where it does not know.
            let numa_node = node.and_then(|node| node.trim().parse::<i64>().ok()).and_then(|node| node.try_into().ok());
            Some(Adapter { name: entry.file_name().into_string().ok()?, numa_node })
        })
        .collect();
    adapters.sort_by(|a, b| a.name.cmp(&b.name));
    adapters
}

/// A list as the kernel writes it: `0-3,8,10-11`. `None` for anything else; an empty list is a node without CPUs.
fn parse_list(text: &str) -> Option<Cpus> {
    /// No kernel counts higher; a longer list is not one.
    const MAX_CPU: u32 = 1 << 16;
    let mut cpus = Cpus::new();
    for part in text.trim().split(',').filter(|part| !part.is_empty()) {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        let (first, last): (u32, u32) = (first.parse().ok()?, last.parse().ok()?);
        if first > last || last >= MAX_CPU {
            return None;
        }
        cpus.extend(first..=last);
    }
    Some(cpus)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn write(sysfs: &Path, path: &str, content: &str) {
        let path = sysfs.join(path);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, content).unwrap();
    }

    /// Two NUMA nodes of four cores with two hardware threads each; an adapter on node 1 and a software one.
    fn large_machine() -> tempfile::TempDir {
        let directory = tempfile::tempdir().unwrap();
        let sysfs = directory.path();
        for cpu in 0..16 {
            let first = cpu % 8;
            write(
                sysfs,
                &format!("devices/system/cpu/cpu{cpu}/topology/core_cpus_list"),
                &format!("{first},{}\n", first + 8),
            );
        }
        write(sysfs, "devices/system/cpu/cpufreq/ignored", "");
        write(sysfs, "devices/system/node/node0/cpulist", "0-3,8-11\n");
        write(sysfs, "devices/system/node/node1/cpulist", "4-7,12-15\n");
        write(sysfs, "devices/system/node/node2/cpulist", "\n");
        write(sysfs, "class/infiniband/mlx5_0/device/numa_node", "1\n");
        write(sysfs, "class/infiniband/rxe0/parent", "eth0\n");
        write(sysfs, "class/infiniband/mlx5_1/device/numa_node", "-1\n");
        directory
    }

    fn no_hwloc() -> Option<Vec<Cpus>> {
        None
    }

    #[test]
    fn sysfs_tells_cores_nodes_and_adapters() {
        let sysfs = large_machine();
        let topology = Topology::discover_in(sysfs.path(), &(0..16).collect(), no_hwloc);
        assert_eq!(topology.source, Source::Sysfs);
        assert_eq!(topology.cores.len(), 8);
        assert_eq!(topology.cores[5], Core { cpus: Cpus::from([5, 13]), numa_node: Some(1) });
        let adapters: Vec<_> = topology.adapters.iter().map(|a| (a.name.as_str(), a.numa_node)).collect();
        assert_eq!(adapters, [("mlx5_0", Some(1)), ("mlx5_1", None), ("rxe0", None)]);
        assert_eq!(topology.fuse_threads(), 4);
    }

    #[test]
    fn hwloc_is_asked_first() {
        let sysfs = large_machine();
        let hwloc = || Some(vec![Cpus::from([0]), Cpus::from([4])]);
        let topology = Topology::discover_in(sysfs.path(), &(0..16).collect(), hwloc);
        assert_eq!(topology.source, Source::Hwloc);
        assert_eq!(topology.cores[1], Core { cpus: Cpus::from([4]), numa_node: Some(1) });
    }

    #[test]
    fn keeps_to_the_cpus_it_may_use() {
        let sysfs = large_machine();
        let topology = Topology::discover_in(sysfs.path(), &Cpus::from([1, 2, 13]), no_hwloc);
        let cores: Vec<_> = topology.cores.iter().map(|core| core.cpus.clone()).collect();
        assert_eq!(cores, [Cpus::from([1]), Cpus::from([2]), Cpus::from([13])]);
    }

    #[test]
    fn without_sysfs_every_cpu_is_a_core() {
        let nothing = tempfile::tempdir().unwrap();
        let topology = Topology::discover_in(nothing.path(), &Cpus::from([3, 4]), no_hwloc);
        assert_eq!(topology.source, Source::Affinity);
        assert_eq!(topology.cores.len(), 2);
        assert_eq!(topology.cores[0].numa_node, None);
        // hwloc that tells of unusable CPUs only is as good as none.
        let topology = Topology::discover_in(nothing.path(), &Cpus::from([3]), || Some(vec![Cpus::from([0])]));
        assert_eq!(topology.source, Source::Affinity);
    }

    #[test]
    fn places_near_the_adapter() {
        let sysfs = large_machine();
        let topology = Topology::discover_in(sysfs.path(), &(0..16).collect(), no_hwloc);
        let placement = topology.place(Some("mlx5_0"), 3, 0);
        assert_eq!(placement.core_thread, Cpus::from([4, 12]));
        assert_eq!(placement.fuse_threads, [Cpus::from([5, 13]), Cpus::from([6, 14]), Cpus::from([7, 15])]);
        assert_eq!(topology.place(None, 1, 0).core_thread, Cpus::from([0, 8]));
        assert_eq!(topology.place(Some("absent"), 1, 0).core_thread, Cpus::from([0, 8]));
    }

    #[test]
    fn daemons_on_one_machine_keep_apart() {
        let sysfs = large_machine();
        let topology = Topology::discover_in(sysfs.path(), &(0..16).collect(), no_hwloc);
        let cores: BTreeSet<Cpus> = (0..3).map(|daemon| topology.place(None, 1, daemon).core_thread).collect();
        assert_eq!(cores.len(), 3);
    }

    #[test]
    fn small_machines_bind_nothing() {
        let nothing = tempfile::tempdir().unwrap();
        let topology = Topology::discover_in(nothing.path(), &Cpus::from([0, 1]), no_hwloc);
        assert_eq!(
            topology.place(None, 2, 0),
            Placement { core_thread: Cpus::new(), fuse_threads: vec![Cpus::new(); 2] }
        );
        assert_eq!(topology.fuse_threads(), 1);
    }

    #[test]
    fn this_machine() {
        let topology = Topology::discover();
        assert!(!topology.cores.is_empty());
        let allowed = allowed_cpus();
        for core in &topology.cores {
            assert!(core.cpus.is_subset(&allowed));
        }
        std::thread::spawn(move || {
            let cpus = topology.cores[0].cpus.clone();
            bind_current_thread(&cpus).unwrap();
            assert_eq!(allowed_cpus(), cpus);
            bind_current_thread(&Cpus::new()).unwrap();
            assert_eq!(allowed_cpus(), cpus);
            let message = bind_current_thread(&Cpus::from([1000])).unwrap_err().to_string();
            assert!(message.contains("1000"), "{message}");
        })
        .join()
        .unwrap();
    }

    proptest! {
        #[test]
        fn lists_never_panic(text in "[0-9,\\- \n]{0,30}") {
            let _ = parse_list(&text);
        }

        #[test]
        fn placement_fits_any_machine(cores in 1usize..12, fuse in 0usize..20, daemon in 0usize..10) {
            let nothing = Path::new("/nonexistent");
            let topology = Topology::discover_in(nothing, &(0..cores as u32).collect(), no_hwloc);
            let placement = topology.place(Some("rxe0"), fuse, daemon);
            prop_assert_eq!(placement.fuse_threads.len(), fuse);
            if cores >= MIN_CORES_TO_BIND {
                prop_assert!(placement.fuse_threads.iter().all(|cpus| *cpus != placement.core_thread));
            }
        }
    }
}
