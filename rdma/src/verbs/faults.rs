//! What goes wrong on a fabric, made to happen on an RDMA device: queue pairs in error, peers that stop or vanish, links that go
//! down. Waits are bounded, errors say what it was, connections come back, and no message is lost or comes twice.
//!
//! For a machine with a device, by scripts/steps/verbs.sh: VERBFS_RDMA_ADDRESS is its address, as for the conformance suite.

use std::net::{IpAddr, SocketAddr};
use std::time::{Duration, Instant};

use super::*;
use crate::endpoint::{Endpoint, Event as Happened, Limits, SendError};
use crate::{Lane, PostError, WorkError};

const FIRST_PORT: u16 = 18_600;
/// One call takes no longer. Asking a port waits for the kernel's lock of interfaces, which is held while one of them is taken
/// down: in an emulated machine on a loaded host that was 4.6 s.
const LONGEST_CALL: Duration = Duration::from_secs(10);
/// Above what the device needs to give a silent peer up (2 s), with room for an emulated machine.
const PATIENCE: Duration = Duration::from_secs(60);

fn variable(name: &str) -> Option<String> {
    std::env::var(name).ok()
}

fn address() -> IpAddr {
    let address = variable("VERBFS_RDMA_ADDRESS").expect("VERBFS_RDMA_ADDRESS: the address of an RDMA device");
    address.parse().expect("VERBFS_RDMA_ADDRESS is an IP address")
}

/// A node that counts: messages carry their number, and must come in order, each once.
struct Node {
    endpoint: Endpoint,
    peer: u16,
    sent: u64,
    received: u64,
    ended: Vec<(Instant, DisconnectReason)>,
    completed: Vec<(u64, Result<(), WorkError>)>,
    up: bool,
    again: Option<Instant>,
}

impl Node {
    fn start(slot: u16, peer: u16, addresses: BTreeMap<u16, SocketAddr>, incarnation: u32) -> Node {
        let filter = tracing_subscriber::EnvFilter::from_default_env();
        let _ = tracing_subscriber::fmt().with_env_filter(filter).with_test_writer().try_init();
        let limits = Limits::default();
        let fabric = VerbsFabric::new(VerbsConfig {
            slot,
            incarnation: Incarnation { node: incarnation, daemon: 1 },
            cluster: "faults".into(),
            key: [9; 32],
            addresses,
            handshake_timeout: limits.handshake_timeout,
        });
        let fabric = fabric.unwrap_or_else(|error| panic!("{error}"));
        let mut endpoint = Endpoint::with_fabric(slot, limits, Box::new(fabric));
        endpoint.listen().unwrap();
        let (ended, completed) = (Vec::new(), Vec::new());
        Node { endpoint, peer, sent: 0, received: 0, ended, completed, up: false, again: None }
    }

    fn here(slot: u16) -> Node {
        let addresses = (1..=2).map(|slot| (slot, SocketAddr::new(address(), FIRST_PORT + slot))).collect();
        Node::start(slot, 3 - slot, addresses, 1)
    }

    fn connect(&mut self) {
        self.endpoint.connect(self.peer).unwrap();
    }

    /// Takes what has happened. A connection that ended, or was not to be had, is asked for again a little later.
    fn poll(&mut self) {
        let mut events = Vec::new();
        self.endpoint.poll(&mut events);
        for event in events {
            match event {
                Happened::Connected { .. } => (self.up, self.again) = (true, None),
                Happened::Disconnected { reason, .. } => {
                    self.up = false;
                    self.ended.push((Instant::now(), reason));
                    self.again = Some(Instant::now());
                }
                Happened::ConnectFailed { reason, .. } => {
                    tracing::info!(%reason, "cannot connect");
                    self.again = Some(Instant::now() + Duration::from_millis(200));
                }
                Happened::Message { payload, .. } => {
                    let number = u64::from_le_bytes(payload[..8].try_into().unwrap());
                    assert_eq!(number, self.received, "a message was lost, doubled or overtaken");
                    assert!(payload[8..].iter().all(|byte| *byte == number as u8), "message {number} is garbled");
                    self.received += 1;
                }
                Happened::Completed { work_id, result, .. } => self.completed.push((work_id, result)),
                Happened::SessionLost { loss, .. } => panic!("the session is lost: {loss:?}"),
            }
        }
        // Both may ask: the connections become one.
        if !self.up && self.again.is_some_and(|at| at <= Instant::now()) {
            self.again = None;
            self.connect();
        }
    }

    /// Sends the next message; false: so much is queued that it must wait.
    fn send(&mut self) -> bool {
        let number = self.sent;
        let length = [8, 100, 1000, 3000][number as usize % 4];
        let mut payload = vec![number as u8; length];
        payload[..8].copy_from_slice(&number.to_le_bytes());
        match self.endpoint.send(self.peer, Lane::Ns, &payload) {
            Ok(()) => {
                self.sent += 1;
                true
            }
            Err(SendError::QueueFull) => false,
            Err(error) => panic!("{error}"),
        }
    }
}

/// Polls until `done`; nothing here may take longer than PATIENCE.
fn until(what: &str, nodes: &mut [&mut Node], mut done: impl FnMut(&mut [&mut Node]) -> bool) {
    let begun = Instant::now();
    loop {
        nodes.iter_mut().for_each(|node| node.poll());
        if done(nodes) {
            return;
        }
        let states = || nodes.iter().map(|n| (n.sent, n.received, n.up, n.ended.len())).collect::<Vec<_>>();
        assert!(begun.elapsed() < PATIENCE, "{what} within {PATIENCE:?}; sent, received, up, ended: {:?}", states());
        std::thread::yield_now();
    }
}

fn pair() -> (Node, Node) {
    let (mut a, mut b) = (Node::here(1), Node::here(2));
    a.connect();
    until("connected", &mut [&mut a, &mut b], |nodes| nodes.iter().all(|node| node.up));
    (a, b)
}

/// One side's queue pair goes into error, again and again, in the middle of messages both ways.
#[test]
#[ignore = "needs an RDMA device: see scripts/steps/verbs.sh"]
fn a_queue_pair_in_error_costs_no_message() {
    const ROUNDS: u64 = 8;
    const MESSAGES: u64 = 40;
    const BEFORE: u64 = 1;
    const BEHIND: u64 = 2;
    let (mut a, mut b) = pair();
    let target = b.endpoint.register_memory(4096).unwrap();
    let local = a.endpoint.register_local_memory(4096).unwrap();
    for round in 0..ROUNDS {
        let all = (round + 1) * MESSAGES;
        let broken = round * MESSAGES + MESSAGES / 2;
        while a.sent < all {
            if a.sent == broken {
                let (ends, ended) = ([a.ended.len(), b.ended.len()], a.completed.len());
                // What is posted before the error ends, done or not; what is posted behind it cannot have been done.
                a.endpoint.write(2, &local, 0, target.key(), 0, 4096, BEFORE).unwrap();
                let side = if round % 2 == 0 { &mut a } else { &mut b };
                side.endpoint.break_queue_pair(side.peer);
                assert!(a.send() && a.send() && b.send() && b.send());
                a.endpoint.write(2, &local, 0, target.key(), 0, 4096, BEHIND).unwrap();
                until("both notice", &mut [&mut a, &mut b], |n| {
                    n[0].ended.len() > ends[0] && n[1].ended.len() > ends[1]
                });
                until("the operations end", &mut [&mut a, &mut b], |n| n[0].completed.len() >= ended + 2);
                let [(BEFORE, before), (BEHIND, behind)] = a.completed[ended..] else { panic!("{:?}", a.completed) };
                assert!(matches!(before, Ok(()) | Err(WorkError::Flushed)), "{before:?}");
                // The other side's error is not ours: there it may have been done just before.
                assert!(behind == Err(WorkError::Flushed) || round % 2 == 1, "{behind:?}");
            }
            assert!(a.send() && b.send());
            a.poll();
            b.poll();
        }
        until("all messages", &mut [&mut a, &mut b], |n| n[0].received == all && n[1].received == all);
    }
    // The last may have taken the place of one that both had asked for.
    assert!(a.endpoint.statistics().connections > ROUNDS);
    assert_eq!(a.endpoint.statistics().sessions_lost + b.endpoint.statistics().sessions_lost, 0);
    println!(
        "{} connections, {} records sent again",
        a.endpoint.statistics().connections,
        a.endpoint.statistics().records_resent
    );
}

/// The program of a child process: answers each message it gets, until nobody is there.
#[test]
#[ignore = "the program of another test's child process"]
fn echo_child() {
    if variable("VERBFS_CHILD").is_none() {
        return;
    }
    let mut node = Node::here(2);
    let begun = Instant::now();
    while begun.elapsed() < 4 * PATIENCE && node.ended.is_empty() {
        node.poll();
        while node.sent < node.received && node.send() {}
        std::thread::sleep(Duration::from_micros(200));
    }
    std::process::exit(0);
}

/// A peer's process stands still: what is sent to it is bounded, one-sided operations go on, nobody waits, and it all arrives.
#[test]
#[ignore = "needs an RDMA device: see scripts/steps/verbs.sh"]
fn a_peer_that_stops_reading_keeps_nobody() {
    let mut a = Node::here(1);
    let mut child = std::process::Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "verbs::faults::echo_child", "--include-ignored", "--nocapture"])
        .env("VERBFS_CHILD", "yes")
        .stdout(std::process::Stdio::null())
        .spawn()
        .unwrap();
    let pid = child.id() as libc::pid_t;
    a.again = Some(Instant::now());
    until("the child connects", &mut [&mut a], |n| n[0].up);
    assert!(a.send());
    until("the child answers", &mut [&mut a], |n| n[0].received == 1);
    // SAFETY: no pointers are passed; the child is ours and has not been waited for.
    assert_eq!(unsafe { libc::kill(pid, libc::SIGSTOP) }, 0);
    let begun = Instant::now();
    let mut slowest = Duration::ZERO;
    loop {
        let call = Instant::now();
        let taken = a.send();
        a.poll();
        slowest = slowest.max(call.elapsed());
        if !taken {
            break;
        }
        assert!(begun.elapsed() < PATIENCE, "what is queued for a peer that reads nothing has no bound");
    }
    // It stays as it is for longer than the device's retries: that a process does not read is no fault of the connection.
    while begun.elapsed() < Duration::from_secs(5) {
        let call = Instant::now();
        assert!(!a.send());
        a.poll();
        slowest = slowest.max(call.elapsed());
        std::thread::sleep(Duration::from_millis(1));
    }
    assert!(a.up && a.ended.is_empty(), "{:?}", a.ended);
    println!("{} messages taken while the peer stood still; the longest call took {slowest:?}", a.sent - 1);
    assert!(slowest < LONGEST_CALL, "{slowest:?}");
    // SAFETY: as above.
    assert_eq!(unsafe { libc::kill(pid, libc::SIGCONT) }, 0);
    until("all answers", &mut [&mut a], |n| n[0].received == n[0].sent);
    // Killed, it is noticed at once: its kernel says good-bye.
    let killed = Instant::now();
    child.kill().unwrap();
    child.wait().unwrap();
    until("its end is noticed", &mut [&mut a], |n| !n[0].ended.is_empty());
    println!("a killed peer was noticed after {:?}", killed.elapsed());
    assert_eq!(a.ended[0].1, DisconnectReason::PeerClosed);
    let local = a.endpoint.register_local_memory(8).unwrap();
    let outcome = a.endpoint.write(2, &local, 0, RemoteKey(1), 0, 8, 1);
    assert_eq!(outcome, Err(PostError::NotConnected(2)));
}

/// What this process and the device hold, by name.
fn holdings() -> BTreeMap<String, u64> {
    let mut found = BTreeMap::new();
    found.insert("descriptors".to_string(), std::fs::read_dir("/proc/self/fd").unwrap().count() as u64);
    found.insert("threads".to_string(), std::fs::read_dir("/proc/self/task").unwrap().count() as u64);
    // `0: rxe0: pd 1 cq 1 qp 1 cm_id 0 mr 0 ctx 0 srq 0`: of the one device there is.
    let output = std::process::Command::new("rdma").args(["resource", "show"]).output().expect("the tool rdma");
    let text = String::from_utf8(output.stdout).unwrap();
    let words: Vec<&str> = text.split_whitespace().skip(2).collect();
    for pair in words.chunks_exact(2) {
        found.insert(pair[0].to_string(), pair[1].parse().expect("a number of rdma resource show"));
    }
    assert!(found.contains_key("qp"), "{text}");
    found
}

fn resident_kib() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap();
    line.trim().trim_end_matches(" kB").parse().unwrap()
}

/// VERBFS_TEST_CONNECTS says how often.
#[test]
#[ignore = "needs an RDMA device: see scripts/steps/verbs.sh"]
fn connections_leave_nothing_behind() {
    let rounds: u64 = variable("VERBFS_TEST_CONNECTS").map_or(300, |count| count.parse().unwrap());
    let warm_up = rounds / 5;
    let (mut a, mut b) = pair();
    // Good-byes are said after a connection: wait until as little is held as before, or for as long as they may take.
    let settled = |a: &mut Node, b: &mut Node, wanted: Option<&BTreeMap<String, u64>>| {
        let begun = Instant::now();
        loop {
            a.poll();
            b.poll();
            let now = holdings();
            if wanted == Some(&now) || begun.elapsed() > CLOSING_TIMEOUT + Duration::from_secs(3) {
                return now;
            }
            std::thread::sleep(Duration::from_millis(20));
        }
    };
    let mut before = None;
    let begun = Instant::now();
    for round in 0..warm_up + rounds {
        if round == warm_up {
            before = Some((settled(&mut a, &mut b, None), resident_kib()));
        }
        let ends = [a.ended.len(), b.ended.len()];
        let all = a.sent + 1;
        assert!(a.send() && b.send());
        until("a message each way", &mut [&mut a, &mut b], |n| n.iter().all(|n| n.received == all));
        if round % 2 == 0 {
            a.endpoint.disconnect(2)
        } else {
            b.endpoint.disconnect(1)
        }
        until("the end", &mut [&mut a, &mut b], |n| n[0].ended.len() > ends[0] && n[1].ended.len() > ends[1]);
        until("connected again", &mut [&mut a, &mut b], |n| n.iter().all(|n| n.up));
    }
    let (held, resident) = before.expect("the warm-up is over");
    let after = settled(&mut a, &mut b, Some(&held));
    let grown = resident_kib().saturating_sub(resident);
    println!("{rounds} connects and disconnects in {:?}: {after:?}, {grown} KiB more resident", begun.elapsed());
    assert_eq!(after, held);
    // A leak of one allocation for each would be more.
    assert!(grown * 1024 < 100 * rounds + (1 << 20), "{grown} KiB more after {rounds} connections");
}

/// One of two hosts: VERBFS_FAULT_PEER is the address of the other, VERBFS_FAULT_SLOT our own slot, 1 or 2. Both send numbered
/// messages, a few a millisecond, until VERBFS_FAULT_FILE appears on both sides' common directory, and then until all have come.
/// What happens to link and machines meanwhile is the script's doing.
#[test]
#[ignore = "for two machines: see scripts/steps/lib/verbs-faults.sh"]
fn host_of_two() {
    let Some(peer) = variable("VERBFS_FAULT_PEER") else { return };
    let slot: u16 = variable("VERBFS_FAULT_SLOT").unwrap().parse().unwrap();
    let directory = std::path::PathBuf::from(variable("VERBFS_FAULT_DIRECTORY").unwrap());
    let peer: IpAddr = peer.parse().unwrap();
    let other = 3 - slot;
    let addresses = [(slot, SocketAddr::new(address(), FIRST_PORT)), (other, SocketAddr::new(peer, FIRST_PORT))];
    let mut node = Node::start(slot, other, addresses.into_iter().collect(), 1);
    node.again = Some(Instant::now());
    until("connected", &mut [&mut node], |n| n[0].up);
    std::fs::write(directory.join(format!("up.{slot}")), "").unwrap();
    let begun = Instant::now();
    let (mut longest, mut last_look) = (Duration::ZERO, Instant::now());
    let mut totals: Option<u64> = None;
    loop {
        let call = Instant::now();
        node.poll();
        if totals.is_none() {
            node.send();
            node.send();
        }
        longest = longest.max(call.elapsed());
        if last_look.elapsed() > Duration::from_millis(200) {
            last_look = Instant::now();
            if totals.is_none() && directory.join("enough").exists() {
                totals = Some(node.sent);
                std::fs::write(directory.join(format!("sent.{slot}.new")), node.sent.to_string()).unwrap();
                std::fs::rename(directory.join(format!("sent.{slot}.new")), directory.join(format!("sent.{slot}")))
                    .unwrap();
            }
            let expected = std::fs::read_to_string(directory.join(format!("sent.{other}")));
            if totals.is_some() && expected.is_ok_and(|sent| sent.parse() == Ok(node.received)) {
                std::fs::write(directory.join(format!("all.{slot}")), "").unwrap();
                if directory.join(format!("all.{other}")).exists() {
                    break;
                }
            }
        }
        assert!(begun.elapsed() < 3 * PATIENCE, "sent {}, received {}, up {}", node.sent, node.received, node.up);
        std::thread::sleep(Duration::from_millis(1));
    }
    let ends: Vec<_> =
        node.ended.iter().map(|(at, why)| format!("{:.1} s: {why}", (*at - begun).as_secs_f64())).collect();
    println!(
        "slot {slot}: {} messages sent, {} received in order, {} sent again; connections ended: {ends:?}; longest call {longest:?}",
        node.sent,
        node.received,
        node.endpoint.statistics().records_resent
    );
    // Who is stopped takes its time; nobody else may.
    if variable("VERBFS_FAULT_STOPPED").is_none() {
        assert!(longest < LONGEST_CALL, "{longest:?}");
    }
    let wanted: usize = variable("VERBFS_FAULT_ENDS").map_or(0, |count| count.parse().unwrap());
    assert!(node.ended.len() >= wanted, "{} connections ended, and {wanted} should have", node.ended.len());
}
