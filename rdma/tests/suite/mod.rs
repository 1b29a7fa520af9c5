//! What every provider, and the mailbox on it, must do. Generic over [`Provider`]: the tests are the same for each, and
//! each has a program of its own that names it (`conformance.rs`, `conformance_verbs.rs`).

use std::path::Path;
use std::time::{Duration, Instant};

use proptest::prelude::*;
use verbfs_rdma::endpoint::{Endpoint, EndpointConfig, Event, Limits};
use verbfs_rdma::fabric::{CONTROL_LENGTH_MAXIMUM, Fabric, FabricEvent, Local, Remote};
use verbfs_rdma::*;

/// Generous: the machine may be loaded, or emulated. No test measures time.
fn patience() -> Duration {
    let seconds = std::env::var("VERBFS_TEST_PATIENCE").ok().and_then(|seconds| seconds.parse().ok());
    Duration::from_secs(seconds.unwrap_or(30))
}
const KEY: [u8; 32] = [7; 32];

pub trait Provider {
    fn fabric(config: EndpointConfig) -> Box<dyn Fabric>;
    /// How many random cases and rounds, in percent of what the fastest provider does.
    const EFFORT: u32;

    fn endpoint(config: EndpointConfig) -> Endpoint {
        Endpoint::with_fabric(config.slot, config.limits, Self::fabric(config))
    }
    fn effort(full: u32) -> u32 {
        (full * Self::EFFORT / 100).max(2)
    }
}

fn config(directory: &Path, slot: u16, node_incarnation: u32, daemon_incarnation: u32) -> EndpointConfig {
    EndpointConfig {
        slot,
        node_incarnation,
        daemon_incarnation,
        cluster: "conformance".into(),
        key: KEY,
        directory: directory.to_path_buf(),
        limits: Limits::default(),
    }
}

/// One endpoint and everything it has reported and no test has asked for yet.
struct Node {
    endpoint: Endpoint,
    events: Vec<Event>,
}

impl Node {
    fn start<P: Provider>(config: EndpointConfig) -> Node {
        let mut endpoint = P::endpoint(config);
        endpoint.listen().unwrap();
        Node { endpoint, events: Vec::new() }
    }

    fn poll(&mut self) {
        self.endpoint.poll(&mut self.events);
    }

    fn take<T>(&mut self, mut wanted: impl FnMut(&Event) -> Option<T>) -> Option<T> {
        let (index, found) = self.events.iter().enumerate().find_map(|(index, event)| Some((index, wanted(event)?)))?;
        self.events.remove(index);
        Some(found)
    }

    fn messages(&mut self) -> Vec<(Lane, Vec<u8>)> {
        let mut messages = Vec::new();
        self.events.retain_mut(|event| match event {
            Event::Message { lane, payload, .. } => {
                messages.push((*lane, std::mem::take(payload)));
                false
            }
            _ => true,
        });
        messages
    }
}

/// Polls all nodes until `done` says something.
fn until<T>(nodes: &mut [&mut Node], mut done: impl FnMut(&mut [&mut Node]) -> Option<T>) -> T {
    let deadline = Instant::now() + patience();
    loop {
        nodes.iter_mut().for_each(|node| node.poll());
        if let Some(value) = done(nodes) {
            return value;
        }
        if Instant::now() > deadline {
            let events: Vec<_> = nodes.iter().map(|node| node.events.iter().take(20).collect::<Vec<_>>()).collect();
            panic!("nothing came; unclaimed: {events:?}");
        }
        std::thread::yield_now();
    }
}

fn connected(event: &Event) -> Option<u16> {
    if let Event::Connected { slot, .. } = event { Some(*slot) } else { None }
}

fn connect(a: &mut Node, b: &mut Node) {
    a.endpoint.connect(b.endpoint.slot()).unwrap();
    let mut seen = [false; 2];
    until(&mut [a, b], |nodes| {
        for (node, seen) in nodes.iter_mut().zip(&mut seen) {
            *seen |= node.take(connected).is_some();
        }
        (seen == [true; 2]).then_some(())
    });
}

fn pair<P: Provider>() -> (tempfile::TempDir, Node, Node) {
    let directory = tempfile::tempdir().unwrap();
    let mut a = Node::start::<P>(config(directory.path(), 1, 1, 1));
    let mut b = Node::start::<P>(config(directory.path(), 2, 1, 1));
    connect(&mut a, &mut b);
    (directory, a, b)
}

fn completion(node: &mut Node, id: u64) -> Result<(), WorkError> {
    until(&mut [node], |nodes| {
        nodes[0].take(|event| match event {
            Event::Completed { work_id, result, .. } if *work_id == id => Some(*result),
            _ => None,
        })
    })
}

pub fn messages_travel_both_ways<P: Provider>() {
    let (_directory, mut a, mut b) = pair::<P>();
    for length in [0, 1, 39, 40, 41, 1000, 1024, 1025, 5000, PAYLOAD_MAXIMUM] {
        let payload: Vec<u8> = (0..length).map(|index| (index * 7 + length) as u8).collect();
        a.endpoint.send(2, Lane::Io, &payload).unwrap();
        let got = until(&mut [&mut a, &mut b], |nodes| nodes[1].messages().pop());
        assert_eq!(got, (Lane::Io, payload.clone()));
        b.endpoint.send(1, Lane::Ack, &payload).unwrap();
        let got = until(&mut [&mut a, &mut b], |nodes| nodes[0].messages().pop());
        assert_eq!(got, (Lane::Ack, payload));
    }
    assert_eq!(a.endpoint.send(2, Lane::Ns, &vec![0; PAYLOAD_MAXIMUM + 1]), Err(SendError::TooLong));
    assert_eq!(a.endpoint.send(3, Lane::Ns, &[]), Err(SendError::NoSession(3)));
}

pub fn one_sided_operations_work<P: Provider>() {
    let (_directory, mut a, mut b) = pair::<P>();
    let target = b.endpoint.register_memory(1 << 20).unwrap();
    let local = a.endpoint.register_local_memory(1 << 20).unwrap();
    local.write_at(100, b"one-sided");
    a.endpoint.write(2, &local, 100, target.key(), 4097, 9, 1).unwrap();
    a.endpoint.read(2, &local, 200, target.key(), 4097, 9, 2).unwrap();
    a.endpoint.fetch_add(2, &local, 0, target.key(), 8, 5, 3).unwrap();
    a.endpoint.compare_swap(2, &local, 8, target.key(), 8, 5, 77, 4).unwrap();
    a.endpoint.compare_swap(2, &local, 16, target.key(), 8, 5, 78, 5).unwrap();
    for id in 1..=5 {
        assert_eq!(completion(&mut a, id), Ok(()));
    }
    assert_eq!(target.to_vec(4097, 9), b"one-sided");
    assert_eq!(local.to_vec(200, 9), b"one-sided");
    let word = |offset| u64::from_le_bytes(local.to_vec(offset, 8).try_into().unwrap());
    assert_eq!((word(0), word(8), word(16)), (0, 5, 77));
    assert_eq!(target.to_vec(8, 8), 77u64.to_le_bytes());
}

/// A random operation and its expected effect.
#[derive(Debug, Clone)]
enum Step {
    Write { at: usize, bytes: Vec<u8> },
    Read { at: usize, length: usize },
    Add { word: usize, addend: u64 },
    Swap { word: usize, expected: u64, new: u64 },
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        (0..4000usize, proptest::collection::vec(any::<u8>(), 1..96)).prop_map(|(at, bytes)| Step::Write { at, bytes }),
        (0..4000usize, 1..96usize).prop_map(|(at, length)| Step::Read { at, length }),
        (0..8usize, any::<u64>()).prop_map(|(word, addend)| Step::Add { word, addend }),
        (0..8usize, 0..3u64, 0..3u64).prop_map(|(word, expected, new)| Step::Swap { word, expected, new }),
    ]
}

pub fn operations_take_effect_in_order<P: Provider>() {
    let (_directory, mut a, mut b) = pair::<P>();
    let target = b.endpoint.register_memory(4096).unwrap();
    let local = a.endpoint.register_local_memory(64 * 1024).unwrap();
    let mut runner = proptest::test_runner::TestRunner::new(ProptestConfig::with_cases(P::effort(200)));
    let nodes = std::cell::RefCell::new((&mut a, &mut b));
    let strategy = proptest::collection::vec(step(), 1..60);
    runner
        .run(&strategy, |steps| {
            let (a, _) = &mut *nodes.borrow_mut();
            let mut model = target.to_vec(0, 4096);
            let mut expected = Vec::new();
            for (id, step) in steps.iter().enumerate() {
                let place = id * 128;
                let (key, id) = (target.key(), id as u64);
                match step {
                    Step::Write { at, bytes } => {
                        local.write_at(place, bytes);
                        a.endpoint.write(2, &local, place as u64, key, *at as u64, bytes.len() as u32, id).unwrap();
                        model[*at..at + bytes.len()].copy_from_slice(bytes);
                    }
                    Step::Read { at, length } => {
                        a.endpoint.read(2, &local, place as u64, key, *at as u64, *length as u32, id).unwrap();
                        expected.push((place, model[*at..at + length].to_vec()));
                    }
                    Step::Add { word, addend } => {
                        a.endpoint.fetch_add(2, &local, place as u64, key, *word as u64 * 8, *addend, id).unwrap();
                        let range = word * 8..word * 8 + 8;
                        let old = u64::from_le_bytes(model[range.clone()].try_into().unwrap());
                        expected.push((place, old.to_le_bytes().to_vec()));
                        model[range].copy_from_slice(&old.wrapping_add(*addend).to_le_bytes());
                    }
                    Step::Swap { word, expected: want, new } => {
                        a.endpoint
                            .compare_swap(2, &local, place as u64, key, *word as u64 * 8, *want, *new, id)
                            .unwrap();
                        let range = word * 8..word * 8 + 8;
                        let old = u64::from_le_bytes(model[range.clone()].try_into().unwrap());
                        expected.push((place, old.to_le_bytes().to_vec()));
                        if old == *want {
                            model[range].copy_from_slice(&new.to_le_bytes());
                        }
                    }
                }
            }
            let mut ids = Vec::new();
            while ids.len() < steps.len() {
                let id = until(&mut [a], |nodes| {
                    nodes[0].take(|event| match event {
                        Event::Completed { work_id, result: Ok(()), .. } => Some(*work_id),
                        _ => None,
                    })
                });
                ids.push(id);
            }
            prop_assert!(ids.is_sorted(), "completions out of order: {:?}", ids);
            prop_assert_eq!(target.to_vec(0, 4096), model);
            for (place, bytes) in expected {
                prop_assert_eq!(local.to_vec(place, bytes.len()), bytes);
            }
            Ok(())
        })
        .unwrap();
}

pub fn violations_change_nothing_and_end_the_connection<P: Provider>() {
    let (_directory, mut a, mut b) = pair::<P>();
    let target = b.endpoint.register_memory(8192).unwrap();
    let local = a.endpoint.register_local_memory(8192).unwrap();
    target.write_at(0, &[0x55; 8192]);
    local.write_at(0, &[0xaa; 8192]);
    let hidden = b.endpoint.register_local_memory(4096).unwrap();
    let withdrawn = b.endpoint.register_memory(4096).unwrap();
    b.endpoint.deregister(&withdrawn);
    let wrong = RemoteKey(target.key().0 ^ 0x4000_0000);
    let cases: &[(RemoteKey, u64, u32)] = &[
        (target.key(), 8192, 1),
        (target.key(), 8185, 8),
        (target.key(), u64::MAX, 8),
        (target.key(), u64::MAX - 7, 8),
        (target.key(), 1 << 40, 8192),
        (wrong, 0, 8),
        (hidden.key(), 0, 8),
        (withdrawn.key(), 0, 8),
    ];
    for (index, (key, offset, length)) in cases.iter().enumerate() {
        for write in [true, false] {
            let id = index as u64;
            if write {
                a.endpoint.write(2, &local, 0, *key, *offset, *length, id).unwrap();
            } else {
                a.endpoint.read(2, &local, 0, *key, *offset, *length, id).unwrap();
            }
            assert_eq!(completion(&mut a, id), Err(WorkError::RemoteAccess));
            let gone = |event: &Event| matches!(event, Event::Disconnected { .. }).then_some(());
            until(&mut [&mut a, &mut b], |nodes| nodes[0].take(gone));
            until(&mut [&mut a, &mut b], |nodes| nodes[1].take(gone));
            assert_eq!(target.to_vec(0, 8192), vec![0x55; 8192]);
            assert_eq!(local.to_vec(0, 8192), vec![0xaa; 8192]);
            connect(&mut a, &mut b);
        }
    }
    // An atomic on half a word is a violation too, and a wrong local side is never posted.
    assert_eq!(a.endpoint.read(2, &local, 8190, target.key(), 0, 8, 1), Err(PostError::LocalBounds));
    assert_eq!(a.endpoint.fetch_add(2, &local, 4, target.key(), 0, 1, 1), Err(PostError::Misaligned));
    assert_eq!(a.endpoint.read(2, &local, 0, target.key(), 0, 8, u64::MAX), Err(PostError::ReservedWorkId));
    a.endpoint.fetch_add(2, &local, 0, target.key(), 4, 1, 99).unwrap();
    assert_eq!(completion(&mut a, 99), Err(WorkError::RemoteAccess));
    assert_eq!(target.to_vec(0, 8192), vec![0x55; 8192]);
}

pub fn regions_of_any_age_can_be_named<P: Provider>() {
    let (directory, mut a, mut b) = pair::<P>();
    let local = a.endpoint.register_local_memory(4096).unwrap();
    local.write_at(0, b"in the arena");
    let file = std::fs::File::options()
        .read(true)
        .write(true)
        .create(true)
        .truncate(true)
        .open(directory.path().join("arena"))
        .unwrap();
    assert!(b.endpoint.register_file(&file, 8192).is_err(), "longer than the file");
    file.set_len(1 << 20).unwrap();
    let arena = b.endpoint.register_file(&file, 1 << 20).unwrap();
    // The key travels faster than its announcement: never in vain.
    for id in 0..50 {
        let fresh = b.endpoint.register_memory(4096).unwrap();
        a.endpoint.write(2, &local, 0, fresh.key(), 0, 12, id).unwrap();
        assert_eq!(completion(&mut a, id), Ok(()));
        assert_eq!(fresh.to_vec(0, 12), b"in the arena");
        b.endpoint.deregister(&fresh);
    }
    a.endpoint.write(2, &local, 0, arena.key(), 12345, 12, 1).unwrap();
    assert_eq!(completion(&mut a, 1), Ok(()));
    assert_eq!(&std::fs::read(directory.path().join("arena")).unwrap()[12345..12357], b"in the arena");
}

pub fn random_messages_stay_in_order<P: Provider>() {
    let (_directory, mut a, mut b) = pair::<P>();
    let nodes = std::cell::RefCell::new((&mut a, &mut b));
    let length = prop_oneof![8 => 0..200usize, 4 => 900..1100usize, 1 => 1025..300_000usize];
    let strategy = proptest::collection::vec((0..5usize, length, any::<bool>()), 1..400);
    let mut runner = proptest::test_runner::TestRunner::new(ProptestConfig::with_cases(P::effort(150)));
    runner
        .run(&strategy, |messages| {
            let (a, b) = &mut *nodes.borrow_mut();
            exchange(a, b, &messages, |_, _, _| {});
            Ok(())
        })
        .unwrap();
    assert!(
        a.endpoint.statistics().credits_written + b.endpoint.statistics().credits_written > 0,
        "no credit came back"
    );
}

/// Sends the messages (lane, length, from a to b?), disturbed before each by `disturb`, and checks that each arrives once, in
/// the order of its lane.
fn exchange(
    a: &mut Node,
    b: &mut Node,
    messages: &[(usize, usize, bool)],
    mut disturb: impl FnMut(usize, &mut Node, &mut Node),
) {
    let mut sent: [[Vec<Vec<u8>>; 5]; 2] = Default::default();
    let mut got: [[Vec<Vec<u8>>; 5]; 2] = Default::default();
    for (index, (lane, length, forth)) in messages.iter().enumerate() {
        disturb(index, a, b);
        let mut payload = vec![index as u8; *length];
        for (byte, value) in payload.iter_mut().zip((index as u64).to_le_bytes()) {
            *byte = value;
        }
        let (node, to) = if *forth { (&mut *a, 2) } else { (&mut *b, 1) };
        node.endpoint.send(to, Lane::ALL[*lane], &payload).unwrap();
        sent[usize::from(*forth)][*lane].push(payload);
        if index % 7 == 0 {
            a.poll();
            b.poll();
        }
    }
    until(&mut [a, b], |nodes| {
        for (direction, node) in [(1, 1), (0, 0)] {
            for (lane, payload) in nodes[node].messages() {
                got[direction][lane as usize].push(payload);
            }
        }
        // After a disturbance somebody has to connect again; whoever notices, does.
        for (node, peer) in [(0, 2), (1, 1)] {
            if nodes[node]
                .take(|event| matches!(event, Event::ConnectFailed { .. } | Event::Disconnected { .. }).then_some(()))
                .is_some()
                && !nodes[node].endpoint.is_connected(peer)
            {
                nodes[node].endpoint.connect(peer).unwrap();
            }
            while nodes[node].take(connected).is_some() {}
        }
        let count = |all: &[[Vec<Vec<u8>>; 5]; 2]| all.iter().flatten().map(Vec::len).sum::<usize>();
        (count(&got) >= count(&sent)).then_some(())
    });
    assert!(sent == got, "lost, doubled, changed or out of order");
}

pub fn sessions_survive_broken_connections<P: Provider>() {
    let length = prop_oneof![8 => 0..200usize, 4 => 900..1100usize, 2 => 1025..100_000usize];
    let strategy = (
        proptest::collection::vec((0..5usize, length, any::<bool>()), 1..300),
        proptest::collection::vec((0..300usize, 0..5u8), 1..12),
    );
    let resent = std::cell::Cell::new(0);
    let mut runner = proptest::test_runner::TestRunner::new(ProptestConfig::with_cases(P::effort(150)));
    runner
        .run(&strategy, |(messages, breaks)| {
            let (_directory, mut a, mut b) = pair::<P>();
            exchange(&mut a, &mut b, &messages, |index, a, b| {
                for (_, kind) in breaks.iter().filter(|(at, _)| *at == index) {
                    match kind {
                        0 => a.endpoint.disconnect(2),
                        1 => b.endpoint.disconnect(1),
                        2 => {
                            a.endpoint.disconnect(2);
                            b.endpoint.disconnect(1);
                        }
                        3 => {
                            // Both at once, and both connect again at once.
                            a.endpoint.disconnect(2);
                            a.endpoint.connect(2).unwrap();
                            b.endpoint.connect(1).unwrap();
                        }
                        _ => {
                            b.endpoint.disconnect(1);
                            b.poll();
                            b.endpoint.connect(1).unwrap();
                            a.poll();
                        }
                    }
                }
            });
            resent.set(resent.get() + a.endpoint.statistics().records_resent + b.endpoint.statistics().records_resent);
            let lost = a.endpoint.statistics().sessions_lost + b.endpoint.statistics().sessions_lost;
            let violations = a.endpoint.statistics().protocol_violations + b.endpoint.statistics().protocol_violations;
            prop_assert_eq!((lost, violations), (0, 0));
            Ok(())
        })
        .unwrap();
    assert!(resent.get() > 0, "no test ever sent a record again");
}

pub fn credit_runs_out_and_comes_back<P: Provider>() {
    let (_directory, mut a, mut b) = pair::<P>();
    for number in 0..5000u64 {
        a.endpoint.send(2, Lane::Ctrl, &number.to_le_bytes()).unwrap();
    }
    assert!(a.endpoint.queued(2, Lane::Ctrl) > 4000);
    assert!(a.endpoint.statistics().credit_stalls > 4000);
    let mut got = Vec::new();
    until(&mut [&mut a, &mut b], |nodes| {
        got.extend(nodes[1].messages());
        (got.len() >= 5000).then_some(())
    });
    let numbers: Vec<u64> =
        got.iter().map(|(_, payload)| u64::from_le_bytes(payload[..].try_into().unwrap())).collect();
    assert_eq!(numbers, (0..5000).collect::<Vec<_>>());
    assert_eq!(a.endpoint.queued(2, Lane::Ctrl), 0);
}

pub fn queues_are_bounded<P: Provider>() {
    let directory = tempfile::tempdir().unwrap();
    let limits = Limits { queued_messages: 10, queued_bytes: 5000, ..Limits::default() };
    let mut a = Node::start::<P>(EndpointConfig { limits, ..config(directory.path(), 1, 1, 1) });
    let mut b = Node::start::<P>(config(directory.path(), 2, 1, 1));
    connect(&mut a, &mut b);
    let mut sent = 0;
    let error = loop {
        match a.endpoint.send(2, Lane::Ns, &[1; 1000]) {
            Ok(()) => sent += 1,
            Err(error) => break error,
        }
    };
    assert_eq!(error, SendError::QueueFull);
    // Another lane, and other peers, are not concerned.
    a.endpoint.send(2, Lane::Lock, &[2; 1000]).unwrap();
    let mut got = 0;
    until(&mut [&mut a, &mut b], |nodes| {
        got += nodes[1].messages().len();
        (got == sent + 1).then_some(())
    });
}

pub fn a_full_lane_blocks_no_other<P: Provider>() {
    let (_directory, mut a, mut b) = pair::<P>();
    for number in 0..3000u64 {
        a.endpoint.send(2, Lane::Ns, &number.to_le_bytes()).unwrap();
    }
    let large = vec![3; PAYLOAD_MAXIMUM];
    for _ in 0..5 {
        a.endpoint.send(2, Lane::Io, &large).unwrap();
    }
    assert!(a.endpoint.queued(2, Lane::Ns) > 0 && a.endpoint.queued(2, Lane::Io) > 0);
    a.endpoint.send(2, Lane::Ack, b"released").unwrap();
    // The sender is not polled: what is queued cannot move, what follows on the last lane does.
    until(&mut [&mut b], |nodes| {
        nodes[0].take(|event| match event {
            Event::Message { lane: Lane::Ack, payload, .. } => {
                assert_eq!(payload, b"released");
                Some(())
            }
            _ => None,
        })
    });
    assert!(a.endpoint.queued(2, Lane::Ns) > 0 && a.endpoint.queued(2, Lane::Io) > 0);
    let mut got = b.messages().len();
    until(&mut [&mut a, &mut b], |nodes| {
        got += nodes[1].messages().len();
        (got == 3005).then_some(())
    });
}

pub fn a_later_incarnation_ends_the_session<P: Provider>() {
    for (node, daemon) in [(2, 1), (1, 2)] {
        let (directory, mut a, mut b) = pair::<P>();
        b.endpoint.send(1, Lane::Ns, b"before").unwrap();
        until(&mut [&mut a, &mut b], |nodes| nodes[0].messages().pop());
        drop(b);
        until(&mut [&mut a], |nodes| nodes[0].take(|event| matches!(event, Event::Disconnected { .. }).then_some(())));
        a.endpoint.send(2, Lane::Ns, b"to the dead").unwrap();
        let mut b = Node::start::<P>(config(directory.path(), 2, node, daemon));
        connect(&mut a, &mut b);
        let lost = |event: &Event| match event {
            Event::SessionLost { slot: 2, incarnation, loss } => Some((*incarnation, *loss)),
            _ => None,
        };
        assert_eq!(a.take(lost), Some((Incarnation { node: 1, daemon: 1 }, SessionLoss::Incarnation)));
        a.endpoint.send(2, Lane::Ns, b"to the living").unwrap();
        let got = until(&mut [&mut a, &mut b], |nodes| nodes[1].messages().pop());
        assert_eq!(got.1, b"to the living");
        assert!(b.messages().is_empty());
        // The earlier one is not let in any more.
        drop(b);
        let mut stale = Node::start::<P>(config(directory.path(), 2, 1, 1));
        stale.endpoint.connect(1).unwrap();
        let reason = until(&mut [&mut stale, &mut a], |nodes| nodes[0].take(failed));
        assert_eq!(reason, ConnectError::RefusedByPeer(Refusal::Stale));
    }
}

fn failed(event: &Event) -> Option<ConnectError> {
    if let Event::ConnectFailed { reason, .. } = event { Some(reason.clone()) } else { None }
}

pub fn strangers_are_refused<P: Provider>() {
    let directory = tempfile::tempdir().unwrap();
    let mut a = Node::start::<P>(config(directory.path(), 1, 1, 1));
    let mut wrong_key = Node::start::<P>(EndpointConfig { key: [8; 32], ..config(directory.path(), 2, 1, 1) });
    let cluster = "another".into();
    let mut wrong_cluster = Node::start::<P>(EndpointConfig { cluster, ..config(directory.path(), 3, 1, 1) });
    for (node, slot, refusal) in [(&mut wrong_key, 2, Refusal::Key), (&mut wrong_cluster, 3, Refusal::Cluster)] {
        node.endpoint.connect(1).unwrap();
        let reason = until(&mut [node, &mut a], |nodes| nodes[0].take(failed));
        assert_eq!(reason, ConnectError::RefusedByPeer(refusal));
        a.endpoint.connect(slot).unwrap();
        let reason = until(&mut [&mut a, node], |nodes| nodes[0].take(failed));
        assert!(
            reason == ConnectError::RefusedByPeer(refusal) || reason == ConnectError::RefusedByUs(refusal),
            "{reason:?}"
        );
        assert!(node.events.is_empty() && a.events.is_empty());
    }
    // Who has the key and is no member is refused as well, whoever of the two connects; a member is not.
    let mut closed = P::endpoint(config(directory.path(), 5, 1, 1));
    closed.admit_only(&[1, 7]);
    closed.listen().unwrap();
    let mut closed = Node { endpoint: closed, events: Vec::new() };
    let mut uninvited = Node::start::<P>(config(directory.path(), 6, 1, 1));
    uninvited.endpoint.connect(5).unwrap();
    let reason = until(&mut [&mut uninvited, &mut closed], |nodes| nodes[0].take(failed));
    assert_eq!(reason, ConnectError::RefusedByPeer(Refusal::Slot));
    closed.endpoint.connect(6).unwrap();
    let reason = until(&mut [&mut closed, &mut uninvited], |nodes| nodes[0].take(failed));
    assert_eq!(reason, ConnectError::RefusedByUs(Refusal::Slot));
    assert!(closed.events.is_empty() && uninvited.events.is_empty());
    connect(&mut a, &mut closed);

    a.endpoint.connect(4).unwrap();
    assert_eq!(until(&mut [&mut a], |nodes| nodes[0].take(failed)), ConnectError::NotListening(4));
    assert_eq!(a.endpoint.connect(1), Err(ConnectError::InvalidSlot(1)));
    assert_eq!(a.endpoint.connect(u16::MAX), Err(ConnectError::InvalidSlot(u16::MAX)));
}

pub fn simultaneous_connections_become_one<P: Provider>() {
    for _ in 0..P::effort(20) {
        let directory = tempfile::tempdir().unwrap();
        let mut a = Node::start::<P>(config(directory.path(), 1, 1, 1));
        let mut b = Node::start::<P>(config(directory.path(), 2, 1, 1));
        a.endpoint.connect(2).unwrap();
        b.endpoint.connect(1).unwrap();
        until(&mut [&mut a, &mut b], |nodes| {
            (nodes[0].endpoint.is_connected(2) && nodes[1].endpoint.is_connected(1)).then_some(())
        });
        a.endpoint.send(2, Lane::Ns, b"ping").unwrap();
        b.endpoint.send(1, Lane::Ns, b"pong").unwrap();
        let mut got = 0;
        until(&mut [&mut a, &mut b], |nodes| {
            got += nodes[0].messages().len() + nodes[1].messages().len();
            (got == 2).then_some(())
        });
    }
}

pub fn sleepers_are_woken<P: Provider>() {
    let rounds = u64::from(P::effort(3000));
    let (_directory, mut a, mut b) = pair::<P>();
    fn receive(node: &mut Node, rounds_slept: &mut u64) -> u64 {
        let deadline = Instant::now() + patience();
        loop {
            node.poll();
            if let Some((_, payload)) = node.messages().pop() {
                return u64::from_le_bytes(payload[..].try_into().unwrap());
            }
            assert!(Instant::now() < deadline, "nobody woke us");
            if node.endpoint.arm() {
                *rounds_slept += 1;
                let mut entry = libc::pollfd { fd: node.endpoint.event_fd(), events: libc::POLLIN, revents: 0 };
                // SAFETY: one valid pollfd.
                let ready = unsafe { libc::poll(&mut entry, 1, patience().as_millis() as i32) };
                assert_eq!(ready, 1, "nobody woke us");
            }
        }
    }
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let mut slept = 0;
            for _ in 0..rounds {
                let number = receive(&mut b, &mut slept);
                b.endpoint.send(1, Lane::Ack, &number.to_le_bytes()).unwrap();
            }
        });
        let mut slept = 0;
        for number in 0..rounds {
            a.endpoint.send(2, Lane::Lock, &number.to_le_bytes()).unwrap();
            assert_eq!(receive(&mut a, &mut slept), number);
        }
        assert!(slept > 0, "nobody ever slept");
    });
    let wakeups = a.endpoint.statistics().wakeups_written + b.endpoint.statistics().wakeups_written;
    // Each message wakes at most once; credit that returns by a message of its own may wake besides.
    assert!(wakeups > 0 && wakeups <= 2 * rounds + rounds / 10, "{wakeups} wake-ups for {rounds} rounds");
}

/// One thread sleeps in the event descriptor, another posts: the sleeper is woken by the completion.
pub fn completions_wake_the_polling_thread<P: Provider>() {
    let (_directory, mut a, mut b) = pair::<P>();
    let target = b.endpoint.register_memory(4096).unwrap();
    let local = a.endpoint.register_local_memory(4096).unwrap();
    let descriptor = a.endpoint.event_fd();
    let a = std::sync::Mutex::new(a);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let mut completed = 0;
            while completed < 500 {
                let armed = {
                    let mut a = a.lock().unwrap();
                    a.poll();
                    completed += std::mem::take(&mut a.events).len();
                    completed < 500 && a.endpoint.arm()
                };
                if armed {
                    let mut entry = libc::pollfd { fd: descriptor, events: libc::POLLIN, revents: 0 };
                    // SAFETY: one valid pollfd.
                    let ready = unsafe { libc::poll(&mut entry, 1, patience().as_millis() as i32) };
                    assert_eq!(ready, 1, "nobody woke us");
                }
            }
        });
        for id in 0..500 {
            a.lock().unwrap().endpoint.read(2, &local, 0, target.key(), 0, 64, id).unwrap();
            if id % 10 == 0 {
                std::thread::sleep(Duration::from_micros(200));
            }
        }
    });
}

/// A sender that sleeps with a backlog is woken by the credit that comes back.
pub fn credit_wakes_a_sleeping_sender<P: Provider>() {
    let all = P::effort(20_000) as usize;
    let (_directory, mut a, mut b) = pair::<P>();
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let mut got = 0;
            let deadline = Instant::now() + patience();
            while got < all {
                b.poll();
                got += b.messages().len();
                assert!(Instant::now() < deadline, "only {got} messages came");
                std::thread::yield_now();
            }
        });
        for _ in 0..all {
            while a.endpoint.send(2, Lane::Io, &[9; 100]) == Err(SendError::QueueFull) {
                sleep(&mut a);
            }
        }
        while a.endpoint.queued(2, Lane::Io) > 0 {
            sleep(&mut a);
        }
    });
    fn sleep(node: &mut Node) {
        if node.endpoint.arm() {
            let mut entry = libc::pollfd { fd: node.endpoint.event_fd(), events: libc::POLLIN, revents: 0 };
            // SAFETY: one valid pollfd.
            let ready = unsafe { libc::poll(&mut entry, 1, patience().as_millis() as i32) };
            assert_eq!(ready, 1, "nobody woke us");
        }
        node.poll();
    }
}

struct Bare {
    fabric: Box<dyn Fabric>,
    events: Vec<FabricEvent>,
}

impl Bare {
    fn new<P: Provider>(config: EndpointConfig) -> Bare {
        let mut fabric = P::fabric(config);
        fabric.listen().unwrap();
        Bare { fabric, events: Vec::new() }
    }
    fn take<T>(&mut self, mut wanted: impl FnMut(&FabricEvent) -> Option<T>) -> Option<T> {
        self.fabric.poll(&mut self.events);
        let (index, found) = self.events.iter().enumerate().find_map(|(index, event)| Some((index, wanted(event)?)))?;
        self.events.remove(index);
        Some(found)
    }
}

fn patiently<T>(mut attempt: impl FnMut() -> Option<T>) -> T {
    let deadline = Instant::now() + patience();
    loop {
        if let Some(value) = attempt() {
            return value;
        }
        assert!(Instant::now() < deadline, "nothing came");
        std::thread::yield_now();
    }
}

pub fn immediates_arrive_in_order_and_none_is_lost<P: Provider>() {
    let directory = tempfile::tempdir().unwrap();
    let mut a = Bare::new::<P>(config(directory.path(), 1, 1, 1));
    let mut b = Bare::new::<P>(config(directory.path(), 2, 1, 1));
    a.fabric.connect(2).unwrap();
    let up = |event: &FabricEvent| matches!(event, FabricEvent::Connected { .. }).then_some(());
    let mut connected = [false; 2];
    patiently(|| {
        connected[0] |= a.take(up).is_some();
        connected[1] |= b.take(up).is_some();
        (connected == [true; 2]).then_some(())
    });
    let target = b.fabric.register_memory(64 * 1024, Access::Everyone).unwrap();
    let local = a.fabric.register_memory(64 * 1024, Access::Local).unwrap();
    let (mut posted, mut refused) = (0u32, 0);
    let mut received = 0u32;
    while received < 8000 {
        while posted < 8000 {
            let offset = u64::from(posted % 8000) * 8;
            local.write_at(offset as usize, &(u64::from(posted) + 1).to_le_bytes());
            let source = Local { region: &local, offset, length: 8 };
            let remote = Remote { key: target.key(), offset };
            match a.fabric.write_with_immediate(2, source, remote, posted, u64::from(posted)) {
                Ok(()) => posted += 1,
                Err(error) => {
                    assert_eq!(error, PostError::QueueFull);
                    refused += 1;
                    break;
                }
            }
        }
        patiently(|| {
            a.fabric.poll(&mut a.events);
            let mut any = false;
            while let Some((immediate, length)) = b.take(|event| match event {
                FabricEvent::Received { immediate, length, .. } => Some((*immediate, *length)),
                _ => None,
            }) {
                assert_eq!((immediate, length), (received, 8));
                assert_eq!(target.to_vec(immediate as usize * 8, 8), (u64::from(immediate) + 1).to_le_bytes());
                received += 1;
                any = true;
            }
            any.then_some(())
        });
    }
    assert!(refused > 0, "the queue never filled");
    let mut completed = 0;
    patiently(|| {
        while let Some((work_id, result)) = a.take(|event| match event {
            FabricEvent::Completed { work_id, result, .. } => Some((*work_id, *result)),
            _ => None,
        }) {
            assert_eq!((work_id, result), (completed, Ok(())));
            completed += 1;
        }
        (completed == 8000).then_some(())
    });
}

/// A peer that knows the cluster key and then does as it likes: it speaks to an endpoint through the bare fabric.
struct Villain {
    bare: Bare,
    inbox: RemoteKey,
    local: Region,
}

fn villain<P: Provider>(directory: &Path, slot: u16, victim: &mut Node, wanted: [u64; 5]) -> Villain {
    let mut bare = Bare::new::<P>(config(directory, slot, 1, 1));
    let inbox = bare.fabric.register_memory(128 * 1024, Access::Everyone).unwrap();
    let local = bare.fabric.register_memory(1 << 20, Access::Everyone).unwrap();
    bare.fabric.connect(victim.endpoint.slot()).unwrap();
    let up = |event: &FabricEvent| matches!(event, FabricEvent::Connected { .. }).then_some(());
    patiently(|| {
        victim.poll();
        bare.take(up)
    });
    let mut set_up = [inbox.key().0.to_le_bytes(), local.key().0.to_le_bytes()].concat();
    wanted.iter().for_each(|position| set_up.extend_from_slice(&position.to_le_bytes()));
    bare.fabric.send_control(victim.endpoint.slot(), &set_up).unwrap();
    let theirs = patiently(|| {
        victim.poll();
        bare.take(|event| match event {
            FabricEvent::Control { bytes, .. } => Some(bytes.clone()),
            _ => None,
        })
    });
    let inbox = RemoteKey(u32::from_le_bytes(theirs[0..4].try_into().unwrap()));
    Villain { bare, inbox, local }
}

impl Villain {
    fn put(&mut self, victim: &mut Node, offset: u64, bytes: &[u8]) {
        self.local.write_at(0, bytes);
        let source = Local { region: &self.local, offset: 0, length: bytes.len() as u32 };
        let _ = self.bare.fabric.publish(victim.endpoint.slot(), source, Remote { key: self.inbox, offset }, 0);
    }
}

/// A record as the mailbox writes it, but for what the test wants otherwise. Keeps the layout honest, too.
fn record(sequence: u32, kind: u8, lane: u8, acknowledge: (u8, u32), body: &[u8]) -> Vec<u8> {
    let mut bytes = vec![0; 24];
    bytes[0..4].copy_from_slice(&sequence.to_le_bytes());
    bytes[4..6].copy_from_slice(&(body.len() as u16).to_le_bytes());
    bytes[6] = kind;
    bytes[7] = 0xb7;
    bytes[12..16].copy_from_slice(&acknowledge.1.to_le_bytes());
    bytes[16] = acknowledge.0;
    bytes[17] = lane;
    bytes.extend_from_slice(body);
    let sum = crc32c::crc32c(&bytes);
    bytes[8..12].copy_from_slice(&sum.to_le_bytes());
    bytes
}

pub fn a_garbage_record_costs_the_connection_only<P: Provider>() {
    let (directory, mut a, mut b) = pair::<P>();
    let staged = |offset: u64, length: u32| {
        let mut body = [0; 16];
        body[0..8].copy_from_slice(&offset.to_le_bytes());
        body[8..12].copy_from_slice(&length.to_le_bytes());
        record(0, 2, 0, (255, 0), &body)
    };
    let good = record(0, 1, 0, (255, 0), b"honest");
    let mut truncated = record(0, 1, 0, (255, 0), &[5; 600]);
    truncated.truncate(300);
    let mut flipped = good.clone();
    flipped[26] ^= 1;
    let mut cases = vec![
        flipped,
        truncated,
        record(1, 1, 0, (255, 0), b"from the future"),
        record(u32::MAX, 1, 0, (255, 0), b"from the past"),
        record(0, 1, 1, (255, 0), b"of another lane"),
        record(0, 4, 0, (255, 0), b"of no kind"),
        record(0, 1, 0, (9, 0), b"acknowledges no lane"),
        record(0, 1, 0, (2, 1), b"acknowledges what was not sent"),
        record(0, 1, 0, (255, 0), &[1; 1025]),
        record(0, 3, 0, (255, 0), b"a skip with a body"),
        record(0, 2, 0, (255, 0), b"a staged payload without a place"),
        staged(u64::MAX, 4096),
        staged(0, u32::MAX),
        staged(0, 3),
        staged(1 << 40, 4096),
        // In our part of the staging area, but not in the region the villain really has.
        staged((2 << 20) - 8192, 8192),
        vec![0xff; 64],
        vec![1; 64],
    ];
    let mut runner = proptest::test_runner::TestRunner::deterministic();
    for _ in 0..60 {
        let tree = proptest::collection::vec(any::<u8>(), 8..200).new_tree(&mut runner).unwrap();
        let mut bytes = proptest::strategy::ValueTree::current(&tree);
        bytes[7] |= 1;
        cases.push(bytes);
    }
    for (number, bytes) in cases.iter().enumerate() {
        let mut villain = villain::<P>(directory.path(), 3, &mut a, [0; 5]);
        until(&mut [&mut a], |nodes| nodes[0].take(connected));
        villain.put(&mut a, 0, bytes);
        let reason = until(&mut [&mut a], |nodes| {
            nodes[0].take(|event| match event {
                Event::Disconnected { slot: 3, reason } => Some(*reason),
                Event::Message { slot: 3, payload, .. } => panic!("case {number} was delivered: {payload:?}"),
                _ => None,
            })
        });
        let expected = matches!(reason, DisconnectReason::Protocol(_) | DisconnectReason::RemoteAccess);
        assert!(expected, "case {number}: {reason:?}");
        patiently(|| villain.bare.take(|event| matches!(event, FabricEvent::Disconnected { .. }).then_some(())));
    }
    // A record just like these, but right, is delivered: the cases fail for what they say.
    let mut villain = villain::<P>(directory.path(), 3, &mut a, [0; 5]);
    until(&mut [&mut a], |nodes| nodes[0].take(connected));
    villain.put(&mut a, 0, &good);
    assert_eq!(until(&mut [&mut a], |nodes| nodes[0].messages().pop()).1, b"honest");
    // Credit for what was never sent.
    a.endpoint.send(3, Lane::Ns, b"one").unwrap();
    for _ in 0..300 {
        a.endpoint.send(3, Lane::Ns, b"more than the ring holds").unwrap();
    }
    villain.put(&mut a, 5 * 16 * 1024, &100_000u64.to_le_bytes());
    until(&mut [&mut a], |nodes| {
        nodes[0].take(|event| {
            matches!(event, Event::Disconnected { slot: 3, reason: DisconnectReason::Protocol(_) }).then_some(())
        })
    });
    // And all the while the others never noticed.
    assert!(a.endpoint.is_connected(2));
    a.endpoint.send(2, Lane::Ns, b"still here").unwrap();
    assert_eq!(until(&mut [&mut a, &mut b], |nodes| nodes[1].messages().pop()).1, b"still here");
    assert_eq!(a.endpoint.statistics().sessions_lost, 0);
}

pub fn a_garbage_set_up_costs_the_connection_only<P: Provider>() {
    let (directory, mut a, mut b) = pair::<P>();
    let gone = |event: &Event| {
        matches!(event, Event::Disconnected { slot: 3, reason: DisconnectReason::Protocol(_) }).then_some(())
    };
    // Wants to hear from a position never reached.
    let _villain = villain::<P>(directory.path(), 3, &mut a, [0, 0, 7, 0, 0]);
    until(&mut [&mut a], |nodes| nodes[0].take(gone));
    drop(_villain);
    // Sets up twice, and once with too little.
    for bytes in [vec![0; 48], vec![1; 47], vec![9; CONTROL_LENGTH_MAXIMUM], vec![]] {
        let mut villain = villain::<P>(directory.path(), 3, &mut a, [0; 5]);
        villain.bare.fabric.send_control(1, &bytes).unwrap();
        until(&mut [&mut a], |nodes| nodes[0].take(gone));
    }
    assert!(a.endpoint.is_connected(2));
    a.endpoint.send(2, Lane::Ns, b"still here").unwrap();
    assert_eq!(until(&mut [&mut a, &mut b], |nodes| nodes[1].messages().pop()).1, b"still here");
}

pub fn fencing_stops_an_endpoint_of_this_process<P: Provider>() {
    for _ in 0..P::effort(10) {
        let (directory, mut a, mut b) = pair::<P>();
        let target = a.endpoint.register_memory(64 * 1024).unwrap();
        let key = target.key();
        let started = std::sync::Barrier::new(2);
        std::thread::scope(|scope| {
            let writer = scope.spawn(|| {
                let local = b.endpoint.register_local_memory(64 * 1024).unwrap();
                started.wait();
                for number in 0u64.. {
                    local.write_at(0, &[number as u8; 4096]);
                    match b.endpoint.write(1, &local, 0, key, 0, 4096, number) {
                        Ok(()) | Err(PostError::QueueFull) => b.poll(),
                        Err(_) => break,
                    }
                }
                // Trying again does not help.
                b.endpoint.connect(1).unwrap();
                b
            });
            started.wait();
            std::thread::sleep(Duration::from_millis(2));
            a.endpoint.fence(2).unwrap();
            let before = target.to_vec(0, 4096);
            std::thread::sleep(Duration::from_millis(5));
            assert_eq!(target.to_vec(0, 4096), before, "memory changed behind the fence");
            let mut b = writer.join().unwrap();
            let reason = until(&mut [&mut a, &mut b], |nodes| nodes[1].take(failed));
            assert_eq!(reason, ConnectError::RefusedByPeer(Refusal::Fenced));
            let lost = |event: &Event| matches!(event, Event::SessionLost { .. }).then_some(());
            assert!(a.take(lost).is_some() && b.take(lost).is_some());
            assert_eq!(a.endpoint.send(2, Lane::Ns, b""), Err(SendError::NoSession(2)));
            assert_eq!(b.endpoint.send(1, Lane::Ns, b""), Err(SendError::NoSession(1)));
            assert_eq!(target.to_vec(0, 4096), before);
        });
        // The next life of that node is welcome.
        let mut b = Node::start::<P>(config(directory.path(), 2, 2, 1));
        connect(&mut a, &mut b);
    }
}

/// What a child's exit says that was refused.
const REFUSED: i32 = 7;

/// The program of a child process: connects to slot 1, writes a growing number into the region whose key it is sent, and
/// connects again when it is cut off, until it is refused.
pub fn child<P: Provider>() {
    let Ok(directory) = std::env::var("VERBFS_CHILD") else { return };
    let incarnation = std::env::var("VERBFS_CHILD_INCARNATION").unwrap().parse().unwrap();
    let mut node = Node::start::<P>(config(Path::new(&directory), 2, incarnation, 1));
    let local = node.endpoint.register_local_memory(4096).unwrap();
    let mut key = None;
    node.endpoint.connect(1).unwrap();
    let deadline = Instant::now() + 4 * patience();
    for number in 1u64.. {
        node.poll();
        if let Some((_, payload)) = node.messages().pop() {
            key = Some(RemoteKey(u32::from_le_bytes(payload[..4].try_into().unwrap())));
            node.endpoint.send(1, Lane::Ack, b"begun").unwrap();
        }
        if node.events.iter().any(|event| failed(event).is_some()) || Instant::now() > deadline {
            std::process::exit(REFUSED);
        }
        if node.events.drain(..).any(|event| matches!(event, Event::Disconnected { .. })) {
            node.endpoint.connect(1).unwrap();
        }
        if let Some(key) = key {
            local.write_at(0, &number.to_le_bytes());
            let _ = node.endpoint.write(1, &local, 0, key, 0, 8, number);
        } else {
            std::thread::sleep(Duration::from_millis(1));
        }
    }
}

/// Ended by the fence, whichever way a provider fences: killed, or cut off and then refused.
fn was_stopped(status: std::process::ExitStatus) -> bool {
    use std::os::unix::process::ExitStatusExt;
    status.signal() == Some(libc::SIGKILL) || status.code() == Some(REFUSED)
}

fn start_child(directory: &Path, incarnation: u32) -> std::process::Child {
    std::process::Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "child", "--include-ignored", "--nocapture"])
        .env("VERBFS_CHILD", directory)
        .env("VERBFS_CHILD_INCARNATION", incarnation.to_string())
        .stdout(std::process::Stdio::null())
        .spawn()
        .unwrap()
}

pub fn a_killed_process_is_noticed_and_fenced<P: Provider>() {
    let directory = tempfile::tempdir().unwrap();
    let mut a = Node::start::<P>(config(directory.path(), 1, 1, 1));
    let target = a.endpoint.register_memory(4096).unwrap();
    let begin = |a: &mut Node, incarnation| {
        let child = start_child(directory.path(), incarnation);
        until(&mut [a], |nodes| nodes[0].take(connected));
        a.endpoint.send(2, Lane::Ns, &target.key().0.to_le_bytes()).unwrap();
        let got = until(&mut [a], |nodes| nodes[0].messages().pop());
        assert_eq!(got, (Lane::Ack, b"begun".to_vec()));
        let before = target.to_vec(0, 8);
        until(&mut [a], |_| (target.to_vec(0, 8) != before).then_some(()));
        child
    };
    // Death is noticed, by a sleeper too.
    let mut child = begin(&mut a, 1);
    child.kill().unwrap();
    let deadline = Instant::now() + patience();
    loop {
        a.poll();
        let gone = |event: &Event| if let Event::Disconnected { reason, .. } = event { Some(*reason) } else { None };
        if let Some(reason) = a.take(gone) {
            assert_eq!(reason, DisconnectReason::PeerClosed);
            break;
        }
        assert!(Instant::now() < deadline);
        if a.endpoint.arm() {
            let mut entry = libc::pollfd { fd: a.endpoint.event_fd(), events: libc::POLLIN, revents: 0 };
            // SAFETY: one valid pollfd.
            assert_eq!(unsafe { libc::poll(&mut entry, 1, patience().as_millis() as i32) }, 1, "death woke nobody");
        }
    }
    child.wait().unwrap();
    a.endpoint.fence(2).unwrap();
    // A fence stops a writer under way.
    let mut child = begin(&mut a, 2);
    a.endpoint.fence(2).unwrap();
    let before = target.to_vec(0, 8);
    assert!(was_stopped(until(&mut [&mut a], |_| child.try_wait().unwrap())));
    assert_eq!(target.to_vec(0, 8), before, "memory changed behind the fence");
    // And one whose connection was already gone.
    let mut child = begin(&mut a, 3);
    a.endpoint.disconnect(2);
    a.endpoint.fence(2).unwrap();
    let before = target.to_vec(0, 8);
    assert!(was_stopped(until(&mut [&mut a], |_| child.try_wait().unwrap())));
    assert_eq!(target.to_vec(0, 8), before, "memory changed behind the fence");
    // What was fenced does not come back, what was refused does not come at all, the next life does.
    let mut child = start_child(directory.path(), 3);
    let code = until(&mut [&mut a], |_| child.try_wait().unwrap()).code();
    assert_eq!(code, Some(REFUSED));
    a.endpoint.refuse(2, 4);
    let mut child = start_child(directory.path(), 4);
    let code = until(&mut [&mut a], |_| child.try_wait().unwrap()).code();
    assert_eq!(code, Some(REFUSED));
    let mut child = begin(&mut a, 5);
    child.kill().unwrap();
    child.wait().unwrap();
}

/// The tests, for the provider `$provider`.
macro_rules! conformance {
    ($provider:ty $(, #[$attribute:meta])?) => {
        conformance! { @tests $provider, [$(#[$attribute])?],
            messages_travel_both_ways,
            one_sided_operations_work,
            operations_take_effect_in_order,
            violations_change_nothing_and_end_the_connection,
            regions_of_any_age_can_be_named,
            random_messages_stay_in_order,
            sessions_survive_broken_connections,
            credit_runs_out_and_comes_back,
            queues_are_bounded,
            a_full_lane_blocks_no_other,
            a_later_incarnation_ends_the_session,
            strangers_are_refused,
            simultaneous_connections_become_one,
            sleepers_are_woken,
            completions_wake_the_polling_thread,
            credit_wakes_a_sleeping_sender,
            immediates_arrive_in_order_and_none_is_lost,
            a_garbage_record_costs_the_connection_only,
            a_garbage_set_up_costs_the_connection_only,
            fencing_stops_an_endpoint_of_this_process,
            child,
            a_killed_process_is_noticed_and_fenced,
        }
    };
    (@tests $provider:ty, $attributes:tt, $($test:ident),+ $(,)?) => {
        $(conformance! { @test $provider, $attributes, $test })+
    };
    (@test $provider:ty, [$(#[$attribute:meta])?], $test:ident) => {
        #[test]
        $(#[$attribute])?
        fn $test() {
            suite::$test::<$provider>()
        }
    };
}
