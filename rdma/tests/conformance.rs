//! What every provider, and the mailbox on it, must do. Generic over [`Provider`]: a provider joins by one more `mod` at
//! the end of this file.

use std::path::Path;
use std::time::{Duration, Instant};

use verbfs_rdma::endpoint::{Endpoint, EndpointConfig, Event, Limits};
use verbfs_rdma::*;

/// Generous: the machine may be loaded. No test measures time.
const PATIENCE: Duration = Duration::from_secs(30);
const KEY: [u8; 32] = [7; 32];

trait Provider {
    fn endpoint(config: EndpointConfig) -> Endpoint;
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
    let deadline = Instant::now() + PATIENCE;
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

fn messages_travel_both_ways<P: Provider>() {
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

fn one_sided_operations_work<P: Provider>() {
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

macro_rules! conformance {
    ($($test:ident),+ $(,)?) => {
        mod shm {
            struct Shm;
            impl super::Provider for Shm {
                fn endpoint(config: super::EndpointConfig) -> super::Endpoint {
                    super::Endpoint::new(config).unwrap()
                }
            }
            $(#[test] fn $test() { super::$test::<Shm>() })+
        }
    };
}

conformance! {
    messages_travel_both_ways,
    one_sided_operations_work,
}
